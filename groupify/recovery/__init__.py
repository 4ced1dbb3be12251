"""What uses labelled or unlabelled data after the conversion: fine-tuning."""
