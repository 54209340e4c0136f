"""An analysis read back: tables, figures and page. Nothing here measures."""
