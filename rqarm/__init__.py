"""rqarm."""
