"""Weight files: parameter names, layouts, formats, and the models they belong to."""
