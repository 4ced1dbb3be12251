"""What groupify claims of speed and accuracy is measured here, and written into the README and the pages."""
