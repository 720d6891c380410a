"""The Jobs' promises as a suite against any cluster that is named: ``make test-cluster CONTEXT=...``.

``test_suite.py`` tests the suite itself, against recorded answers of a server.
"""
