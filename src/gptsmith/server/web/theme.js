// Apply the chosen theme before the first paint. Without a choice the page follows the system's theme.
"use strict";
try {
  const theme = localStorage.getItem("gptsmith.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is disabled: the system's theme
}
