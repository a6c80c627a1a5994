// Before anything is painted: the theme that was chosen, if one was. Without a choice the system's is used.
"use strict";
try {
  const theme = localStorage.getItem("gptsmith.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is switched off: the system's theme
}
