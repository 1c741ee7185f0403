"""Who the ranks are, how they meet, agree and stop, and how a lost one is noticed."""
