"""fMRLRec: a multimodal sequential recommender, trained once and deployed at any size."""
