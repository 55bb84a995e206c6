"""How hard an example is: trained or given levels, and what the base model says."""
