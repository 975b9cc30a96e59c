"""Environment families that need packages of their own; common.py imports one when such an --env-id is asked for."""
