"""The web side of the workers: access rules and errors on every one, the API and the console on `triggers`."""
