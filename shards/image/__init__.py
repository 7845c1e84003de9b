"""Image files: checked, decoded within limits, made upright sRGB JPEGs."""
