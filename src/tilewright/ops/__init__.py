"""The semantic op set: native references and traits."""
