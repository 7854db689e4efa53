"""The demo data set: small synthetic videos in Something-Something's published file forms."""
