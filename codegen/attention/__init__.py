"""The forms of attention: one kernel each, and what they share."""
