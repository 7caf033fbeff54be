"""Heads on fixed embeddings: the convex solver and its path of λ, ridge, k-NN and the MLP, and how one is chosen."""
