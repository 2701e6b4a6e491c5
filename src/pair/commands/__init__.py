"""One module per subcommand. Heavy imports happen inside the functions: ``--help`` stays fast."""
