"""An analysis read back: its tables, figures and page; nothing here measures."""
