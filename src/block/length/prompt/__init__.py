"""What is read off a prompt: counts, cues, amounts asked for, words, what it is about."""
