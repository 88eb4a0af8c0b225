"""Image super-resolution that spends bits only where an image needs them."""
