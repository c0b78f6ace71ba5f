"""Training of the autoencoder, the teacher and the LiT student (needs ``litapp[train]``)."""
