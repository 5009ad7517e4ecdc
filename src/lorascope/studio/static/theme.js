// Before the first paint: the theme chosen earlier.
"use strict";
try {
  const kept = localStorage.getItem("lorascope-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch { /* no storage: the system's theme */ }
