"""Code that other frameworks need to load exported weights."""
