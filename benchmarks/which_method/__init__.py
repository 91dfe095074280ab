"""The page docs/which-method.md, see __main__.py."""
