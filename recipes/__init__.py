"""Recipes shipped with normzoo; ``normzoo list recipes`` lists them."""
