"""What clips there are: records, validation, adapters for published annotations, the demo data set."""
