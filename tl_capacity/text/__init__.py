"""Text as rows of tokens, and which of these tokens count."""
