"""Audits: what is wrong with the data, seen from the embeddings and from answers out of fold."""
