"""What people run. The core never imports anything from here."""
