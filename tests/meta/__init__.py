"""The checks of the checks: exit statuses, options, the house and its set-up."""
