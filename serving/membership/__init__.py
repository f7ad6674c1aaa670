"""Who is there: peers by a list, or found over Zenoh."""
