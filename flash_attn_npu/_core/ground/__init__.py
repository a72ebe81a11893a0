"""What everything stands on: arguments, lengths, settings, the policy, the report."""
