"""Windows: how they are cut (`sliding`, `session`), how panes become windows (`panes`), and sessions as an operator."""
