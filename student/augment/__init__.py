"""What training does to the pixels of RGB clips on the device, one file per kind; the recipes say how often."""
