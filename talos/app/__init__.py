"""The application: the command line, the demo, its report, models and tasks."""
