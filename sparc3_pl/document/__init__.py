"""Tables, figures and pages, for terminal, HTML and Markdown."""
