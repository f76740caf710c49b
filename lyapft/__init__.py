"""lyapft: how far does cheap fine-tuning end from full precision, and is the recurrence still stable?"""

__version__ = "0.1.0"
