"""Photos: the embedded ones and the packs that training reads."""
