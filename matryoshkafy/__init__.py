"""matryoshkafy makes any PyTorch model a matryoshka doll: train once, deploy any size."""
