"""The ops in plain torch: what every other backend is compared with, and the fallback."""
