"""Networks: linear attention, the LiT transformer, the RGBA autoencoder, the text encoder."""
