"""Sites x policy x steps -> what each site does on each step. Without torch."""
