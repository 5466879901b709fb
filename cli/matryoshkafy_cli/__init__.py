"""The command line of matryoshkafy: each command parses, calls one verb of the library, prints."""
