"""The command `fusion`: an overview of all commands, and a short way to type each of them."""
