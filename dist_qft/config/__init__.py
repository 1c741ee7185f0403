"""Configuration: the typed tree (`schema`) and how it is read and checked (`load`)."""
