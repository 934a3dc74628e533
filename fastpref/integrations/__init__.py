"""Where fastpref meets other libraries. Each module touches one, and importing it does not import that library."""
