"""The page of the server: HTML, CSS and script, without a resource from elsewhere."""
