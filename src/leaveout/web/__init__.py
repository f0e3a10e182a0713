"""The page, its JSON API, and the MCP server: an index, and perhaps a run, asked from a browser, a program or an agent."""
