"""Speed, measured: the machine's ceilings, the ops, the mixers, and how they are written down."""
