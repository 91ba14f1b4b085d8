"""What a sample is: texts read, filtered, tokenised, and served to the Trainer in batches."""
