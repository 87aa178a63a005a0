"""The pages: one offline HTML report for each kind of result."""
