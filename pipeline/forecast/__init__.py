"""What a build would take: rows, bytes, hours."""
