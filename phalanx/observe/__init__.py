"""What Phalanx tells its operators: logs, events, metrics. Imports no torch."""
