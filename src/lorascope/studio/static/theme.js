// Before the first paint: the theme chosen earlier, and the token that came with the address.
"use strict";
try {
  const kept = localStorage.getItem("lorascope-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  const token = /^#token=([\w-]+)$/.exec(location.hash);
  if (token) {
    sessionStorage.setItem("lorascope-token", token[1]);
    history.replaceState(null, "", location.pathname + location.search);
  }
} catch { /* no storage: the system's theme, and the token asked for again */ }
